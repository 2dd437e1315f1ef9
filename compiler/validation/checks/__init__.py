"""The checks of ``qie validate``: one file a level or subject, gathered in ``checks.registry``."""
