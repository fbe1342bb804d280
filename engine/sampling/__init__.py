"""From logits to tokens: penalties, grammar masks, the draw. May import `engine.link` and `engine.scheduling`."""
