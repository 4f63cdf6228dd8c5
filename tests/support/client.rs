//! A client that is in the middle of its request while something else happens.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::PATIENCE;
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
