"""The same numbers, faster: applied to a built model from outside."""
