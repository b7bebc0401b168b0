"""treedecode inside other libraries."""
