"""Past one machine: the same recipes and methods on Flower's deployment engine.

    server.py       the server's half of a run: meets clients, sends tasks, waits for updates
    site.py         a client's half: its model, its data, what it keeps
    letter.py       what they send each other
    grid.py         letters as Flower's messages
    server_app.py   what Flower starts on the server
    client_app.py   what Flower starts on a client, once for each message; it asks
    worker.py       the process there that has everything loaded
    keys.py         certificates and keys
    guard.py        the server's door
    link.py         anyrank flower server, run, status
    join.py         anyrank flower client
    programs.py     Flower's programs as children of ours
    app/            the app that Flower sends around

Importing this package loads nothing: a client's process for one message has to start quickly.
"""
