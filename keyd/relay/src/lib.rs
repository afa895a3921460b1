//! The TLS relay engine: moves bytes between a program's plain socket and mutual TLS 1.3.
//!
//! The *outer* socket leads to another host and speaks TLS; the *inner* socket leads over loopback to the
//! program, which speaks plain and cannot tell the two of them from a socket of its own. The owner (the key
//! daemon) makes both and decides; the engine shakes hands and moves bytes, for many associations at once, on
//! few threads.
//!
//! ```text
//! handshake(outer, role) -> id ─┬─> Ready{peer's chain} ─┬─ splice(id, inner) ─> Closed{bytes, how}
//!                               │                        └─ refuse(id, how)
//!                               └─> Failed{why, chain shown}
//! ```
//!
//! - The owner polls [`Engine`]'s descriptor and takes events with [`Engine::next_event`]; its calls never
//!   block and may come from any thread; where the first thread is the owner's own ([`Engine::start_here`]), from that.
//! - A descriptor that is passed belongs to the engine, which closes it. Set socket options that are the
//!   program's (keep-alive, device, mark) before; `TCP_NODELAY`, `O_NONBLOCK` and `SO_LINGER` are the engine's.
//! - [`ClientSide`] and [`ServerSide`] are the only ways to make a TLS configuration: TLS 1.3, certificates on
//!   both ends, no early data, tickets within one session only, [`provider`]'s cryptography.
//! - With [`CONFIRM`] a client's `Ready` means that the far engine has spliced: a refusal there comes as
//!   `Failed`, not as a reset of an established connection.
//! - Nothing waits without bound: handshake, verdict and refusal have deadlines ([`Limits`]), handshakes are
//!   counted per peer, and what a slow reader does not take stops the sender by TCP's own window.
//!
//! What the program sees: `close_notify` as FIN and its own FIN as `close_notify`, each direction for itself;
//! RST from the far side as RST, and so too a stream that ends without `close_notify`, a bad record, a cut, and
//! the death of this process. Urgent data arrives in its place in the stream, without the mark.

#![forbid(unsafe_code)]

mod admit;
mod engine;
mod event;
mod exporter;
mod flow;
#[doc(hidden)]
pub mod fuzzing;
mod handshake;
mod hello;
mod opening;
mod provider;
mod record;
mod secrets;
mod sides;
mod socket;
mod spread;
#[cfg(test)]
mod testing;
mod worker;

pub use engine::{Driver, Engine, How, Id, Limits, Role};
pub use event::{Event, Failure};
pub use exporter::Exporter;
pub use flow::Ending;
pub use handshake::Established;
pub use provider::provider;
pub use sides::{CONFIRM, ClientSide, ServerSide};
