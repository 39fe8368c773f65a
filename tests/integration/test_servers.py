"""The servers under the tests answer, whichever rung of the ladder they come from."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
import redis
from kombu import Connection
from sqlalchemy import Engine, create_engine, inspect, text

from tests.local_servers import LocalPostgres, LocalRabbitMQ, LocalRedis


def _round_trip(broker_url: str, queue_name: str) -> object:
    with Connection(broker_url) as connection, connection.SimpleQueue(queue_name) as queue:
        queue.put({"said": "hello"})
        message = queue.get(timeout=10)
        message.ack()
        return message.payload


def _version(url: str) -> int:
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        return connection.info.server_version


class TestPostgreSQL:
    def test_gives_each_test_an_empty_database(self, engine: Engine) -> None:
        assert inspect(engine).get_table_names() == []
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE leftover (id int)"))

    def test_and_the_next_one_too(self, engine: Engine) -> None:
        assert inspect(engine).get_table_names() == []

    def test_is_as_durable_as_in_production(self, engine: Engine) -> None:
        with engine.connect() as connection:
            assert connection.scalar(text("SHOW fsync")) == "on"
            assert connection.scalar(text("SHOW synchronous_commit")) == "on"

    def test_gives_as_many_databases_as_asked_for(self, make_database: Callable[[], str]) -> None:
        assert make_database() != make_database()

    def test_migrates_a_template_once(self, make_migrated_database: Callable[[], str]) -> None:
        for url in (make_migrated_database(), make_migrated_database()):
            engine = create_engine(url)
            assert inspect(engine).get_table_names(schema="outbox")
            engine.dispose()

    def test_comes_back_from_a_power_cut_with_what_was_committed(
        self, private_postgres: LocalPostgres
    ) -> None:
        url = private_postgres.url.replace("+psycopg", "")
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS id")
        private_postgres.kill()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url, connect_timeout=2)
        private_postgres.start()
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT id FROM kept").fetchall() == [(1,)]
        assert _version(url) >= 180000


class TestRedis:
    def test_answers_on_an_empty_database(self, redis_url: str) -> None:
        with redis.Redis.from_url(redis_url) as client:
            assert client.dbsize() == 0
            client.set("leftover", "1")

    def test_and_the_next_one_is_empty_too(self, redis_url: str) -> None:
        with redis.Redis.from_url(redis_url) as client:
            assert client.dbsize() == 0

    def test_comes_back_from_a_kill_with_its_data(self, private_redis: LocalRedis) -> None:
        with redis.Redis.from_url(private_redis.url) as client:
            client.set("kept", "1")
        private_redis.kill()
        private_redis.start()
        with redis.Redis.from_url(private_redis.url) as client:
            assert client.get("kept") == b"1"

    def test_times_out_while_paused(self, private_redis: LocalRedis) -> None:
        with redis.Redis.from_url(private_redis.url, socket_timeout=0.2, retry=None) as client:
            assert client.ping()
            private_redis.pause()
            with pytest.raises(redis.TimeoutError):
                client.ping()
            private_redis.resume()
            assert client.ping()


class TestBrokers:
    def test_carry_a_message(self, bus_url: str, unique_name: str) -> None:
        assert _round_trip(bus_url, unique_name) == {"said": "hello"}

    def test_rabbitmq_comes_back_after_a_restart(
        self, private_rabbitmq: LocalRabbitMQ, unique_name: str
    ) -> None:
        with Connection(private_rabbitmq.url) as connection:
            queue = connection.SimpleQueue(unique_name)
            queue.put({"kept": True})
            queue.close()
        private_rabbitmq.stop()
        private_rabbitmq.start()
        with Connection(private_rabbitmq.url) as connection:
            assert connection.SimpleQueue(unique_name).get(timeout=10).payload == {"kept": True}


@pytest.mark.needs_docker
class TestContainers:
    def test_postgresql_answers(self, docker_postgres_url: str) -> None:
        assert _version(docker_postgres_url) >= 140000

    def test_rabbitmq_carries_a_message(self, docker_rabbitmq_url: str, unique_name: str) -> None:
        assert _round_trip(docker_rabbitmq_url, unique_name) == {"said": "hello"}

    def test_redis_answers(self, docker_redis_url: str) -> None:
        with redis.Redis.from_url(docker_redis_url) as client:
            assert client.ping()
