"""A page that shows the first stage beside the reranking, served with the routes of the service."""
