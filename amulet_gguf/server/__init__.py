"""The model behind HTTP: OpenAI's API, a page to chat with, and a guard (extra `server`).

guard     who may ask, and how much: addresses, origins, keys, sizes; before anything is parsed
paths     paths as clients spell them
app       the endpoints
schema    requests in OpenAI's words
asked     what a request asks for, in whichever words it came
served    the model by any name, settings, profiles, limits
answering requests become answers, whole or streamed
replies   answers in OpenAI's words
page      the page: its files, and how they become one document
starting  what is answered while the model is being loaded
run       sockets, time limits of connections
ending    signals and the parent: the process ends in time
logs      logs that nobody has to read
"""
