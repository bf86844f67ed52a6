"""The neutral model: tables of extents, sources of bytes, images, layouts, plans. Opens no file and knows no format."""
