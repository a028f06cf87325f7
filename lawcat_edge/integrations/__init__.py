"""Where this project meets other people's tools: transformers pipelines and the optimum command line."""
