"""NanEcho: a small GPT whose connections grow while it trains, its data and its settings.

Nothing is imported here, so that settings and help texts don't wait for torch.
"""
