"""onnxruntime as an engine: a classifier that speaks vLLM's ``/classify``, and chat, in which it answers the
label.

    launch.py  how it is started    serve.py    the process     api.py  routes
    classifier.py  texts to labels  requests.py  what is asked, and refused
"""
