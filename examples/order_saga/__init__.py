"""An order flows through five services and always ends whole."""
