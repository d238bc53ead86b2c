"""The model behind HTTP: OpenAI's API, a page to chat with, and a guard (extra `server`).

guard     who may ask, and how much: addresses, origins, keys, sizes; before anything is parsed
schema    what may be asked: requests become `Settings` and messages
replies   what is answered: pieces become OpenAI's objects
app       the endpoints
page      the page: its files, and how they become one document
starting  what is answered while the model is being loaded
run       sockets, time limits of connections
ending    signals and the parent: the process ends in time
logs      logs that nobody has to read
"""
