"""report.html of a folder of rows: `page` puts the sections together, `results` holds the rows as they ask for them."""
