"""Models behind HTTP: batches made of what clients send, limits for strangers, an orderly start and end.

`app` has the endpoints, `requests` what is read of a client, `model` and `batching` the way from bytes to an answer,
`server` the process. The packages behind it come with `pip install 'vitfast[serve]'`.
"""
