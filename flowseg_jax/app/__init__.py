"""The page: a model in the browser. `views` makes what it shows, `page` is the page itself (Gradio, the extra `app`)."""
