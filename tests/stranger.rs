//! Somebody else's socket in the group: seen, and never chosen.

use std::io::ErrorKind;
use std::net::TcpListener;

use socket2::{Domain, Socket, Type};

use crate::support::app::App;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::Master;
use crate::support::world::{World, needs_of, world};

/// A listener on the service's address that nobody ever accepts from.
pub(crate) fn stranger(world: &World) -> TcpListener {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&world.address.into()).unwrap();
    socket.listen(128).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.into()
}

fn a_stranger_gets_nothing(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = App::test_worker(world, &format!("--mode {mode} --accept-delay 5")).engine(engine);
        let master = Master::start(world, &app);
        let stranger = stranger(world);
        let status = master.wait_status("a stranger", |status| status.listeners[0].strangers == Some(1));
        assert_eq!(status.generations[0].workers.len(), 4);
        let load = Load::start(slow_accepts(world));
        for generation in 2..=3 {
            master.hup();
            load.answered_by(generation);
        }
        load.end_lossless();
        let accepted = stranger.accept().map_err(|error| error.kind());
        assert!(matches!(accepted, Err(ErrorKind::WouldBlock)), "the stranger was chosen: {accepted:?}");
        master.stop();
    });
}

#[test]
fn a_stranger_gets_nothing_ebpf() {
    a_stranger_gets_nothing("ebpf", "plain");
}

#[test]
fn a_stranger_gets_nothing_cbpf_sdk() {
    a_stranger_gets_nothing("cbpf", "sdk");
}

#[test]
fn a_stranger_gets_nothing_cbpf_unmodified() {
    a_stranger_gets_nothing("cbpf", "plain");
}
