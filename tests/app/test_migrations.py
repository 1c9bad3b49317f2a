from alembic import command

from app.db.migrate import alembic_config


def test_the_tables_are_what_the_migrations_build(servers):
    """Raises when a migration is missing."""
    command.check(alembic_config(servers.database_url))
