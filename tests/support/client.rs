//! A client that is in the middle of its request while something else happens.

use std::io::{Read, Write};
use std::net::TcpStream;

use reuseportd_wire::status::{GenerationStatus, Status};

use super::PATIENCE;
use super::master::Master;
use super::world::World;

/// A connection that has asked for nothing yet, and keeps its worker busy once that has accepted it.
pub(crate) fn open(world: &World) -> TcpStream {
    let mut client = TcpStream::connect(world.address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"half a line").unwrap();
    client
}

/// The rest of its request, and the answer.
pub(crate) fn answer(mut client: TcpStream) -> String {
    let mut answer = String::new();
    client.write_all(b", and the rest\n").unwrap();
    client.read_to_string(&mut answer).unwrap();
    answer
}

/// Two clients of a service with a single worker that answers in its accept loop: that is busy with the one, and the
/// other waits in its queue. Until they are answered its listener can't leave, and so a retirement goes on. (That of a
/// handover worker under `ebpf` leaves after a second all the same: the kernel moves its queue.)
pub(crate) struct Held {
    accepted: TcpStream,
    queued: TcpStream,
}

impl Held {
    pub(crate) fn open(world: &World, master: &Master) -> Held {
        let active = |status: &Status, is_so: fn(&GenerationStatus) -> bool| {
            status
                .generations
                .iter()
                .any(|one| Some(one.generation) == status.active_generation && is_so(one))
        };
        let accepted = open(world);
        master.wait_status("busy", |status| active(status, |one| one.connections == Some(1)));
        let queued = open(world);
        let waits = |one: &GenerationStatus| one.workers[0].listeners[0].accept_queue == Some(1);
        master.wait_status("a client in its queue", |status| active(status, waits));
        Held { accepted, queued }
    }

    /// Both are answered, by this generation.
    pub(crate) fn release(self, generation: u32) {
        for client in [self.accepted, self.queued] {
            let answer = answer(client);
            assert!(answer.contains(&format!("generation={generation} ")), "{answer:?}");
        }
    }
}
