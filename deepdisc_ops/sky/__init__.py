"""Images, geometry and catalogues: the part that is plain astronomy."""
