"""What the providers' upstream is made of: LiteLLM's own thread, what it is handed, what becomes of its
answers, and of its errors."""
