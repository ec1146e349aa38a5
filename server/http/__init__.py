"""HTTP: the routes, what every request passes through, and what routes share."""
