"""The processes of one server: who starts, watches and replaces whom."""
