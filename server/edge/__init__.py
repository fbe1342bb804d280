"""What stands between a client's connection and the routes: keys, origins, permits, clients that leave."""
