"""The service over HTTP: the API of OpenAI's image edits, a page, and what operators ask for."""
