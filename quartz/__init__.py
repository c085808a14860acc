"""The rooms behind the verbs. Each opens with what it is for; a room imports only rooms that stand below it."""
