"""The verb ``compare``: the same fine-tuning from several initialisations."""
