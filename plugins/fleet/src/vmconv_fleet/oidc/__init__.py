"""People sign in at an OpenID provider: authorization code flow with PKCE, verified ID tokens, sessions as tokens."""
