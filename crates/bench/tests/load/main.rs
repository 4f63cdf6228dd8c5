//! The load client against servers that lose connections and datagrams on purpose and keep a tally of their own.

#[cfg(test)]
mod cli;
#[cfg(test)]
mod clients;
#[cfg(test)]
mod flows;
#[cfg(test)]
mod losses;
#[cfg(test)]
mod server;
