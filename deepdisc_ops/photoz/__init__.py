"""Redshift densities and what tells whether they are right."""
