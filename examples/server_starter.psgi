# A PSGI application for a server that takes its sockets from Server::Starter, which reuseportd can be to it:
#   reuseportd --config examples/server_starter.toml
#   curl --unix-socket /tmp/reuseportd-starter.sock http://localhost/
use strict;
use warnings;
use Socket qw(PF_UNIX SOCK_DGRAM pack_sockaddr_un);

# This file is read once, before the server accepts: when its last line has run, the application is loaded. Its sockets
# listen already, so that it is ready: the whole of sd_notify.
if (my $path = $ENV{NOTIFY_SOCKET}) {
    $path =~ s/^@/\0/;
    socket(my $notify, PF_UNIX, SOCK_DGRAM, 0) or die "cannot make a socket: $!";
    send($notify, "READY=1", 0, pack_sockaddr_un($path)) or die "cannot say READY=1: $!";
}

my $delay = $ENV{ANSWER_AFTER} || 0;

sub {
    select(undef, undef, undef, $delay);
    my $generation = $ENV{SERVER_STARTER_GENERATION} || 0;
    return [200, ['Content-Type' => 'text/plain'], ["generation=$generation pid=$$\n"]];
};
