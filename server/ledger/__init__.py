"""The database: everything that was accepted, and every answer."""
