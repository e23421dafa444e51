"""`engrampool doctor`: lookups recorded, asked again, and what slow ones come from."""
