"""Which way of specialising a base is worth shipping, what it costs, and how sure that is."""
