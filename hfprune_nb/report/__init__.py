"""Tables and figures from finished results; needs no torch."""
