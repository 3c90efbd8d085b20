"""From files to records: formats, addresses, and the index over them."""
