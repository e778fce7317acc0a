"""From tokens to text: projectors, fusion and the LLM as one model."""
