"""Trust: identities, the certificate authority, joining, and the roles and tokens of people."""
