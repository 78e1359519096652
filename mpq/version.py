"""The version of mpq, in one place."""

VERSION = "0.1.0"
