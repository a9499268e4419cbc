"""A page in the browser: a chat, and the routing of its pictures."""
