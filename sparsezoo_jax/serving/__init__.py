"""A run behind OpenAI's HTTP interface: requests (`protocol`), their one worker (`worker`), the application (`app`)."""
