"""Who may call what. Knows keys and scopes; knows neither HTTP nor engines."""
