"""Training and sampling in plain torch: neither Ray nor DeepSpeed nor pyarrow is imported here."""
