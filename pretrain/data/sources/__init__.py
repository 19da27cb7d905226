"""Images before they become shards: folders, tables, tars and the digits."""
