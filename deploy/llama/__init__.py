"""llama.cpp as an engine: a server on libllama that speaks what vLLM's speaks, as far as Tiercel asks it.

launch.py     how it is started       serve.py      the process        server.py     what routes share
api.py        chat and completions    requests.py   what is asked, and refused
answering.py  whole and streamed      replies.py    OpenAI's objects   text.py       stop strings
operations.py health, metrics, account, score       template.py        chat templates
engine.py     the thread that decodes sampling.py   the next token     scoring.py    exact KL
"""
