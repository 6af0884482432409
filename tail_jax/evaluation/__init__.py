"""Numbers from embeddings (`retrieval`) and from result matrices (`continual`)."""
