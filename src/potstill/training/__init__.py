"""One trainer for every algorithm: drive, save, resume, evaluate; and the resources that it may use."""
