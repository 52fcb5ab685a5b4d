//! What CPUs send each other.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use core::sync::atomic::{AtomicBool, Ordering};

use spin::Mutex;

use crate::task::VcpuTask;

/// A message to a CPU.
pub enum Message {
    /// The vCPU with this number, which is parked there, is queued: something was posted to it.
    Wake(u16),
    /// It is that CPU's from now on.
    Take(Box<VcpuTask>),
}

/// Messages that a CPU has not read yet.
///
/// There is one about each vCPU at most: a parked one is woken once ([`crate::wake`]), and one
/// that is on its way is nobody's to send. So the queue never grows beyond what was reserved.
pub struct Inbox {
    messages: Mutex<VecDeque<Message>>,
    /// Looked at without the lock.
    any: AtomicBool,
}

impl Inbox {
    /// An empty one.
    pub fn new() -> Self {
        Self { messages: Mutex::new(VecDeque::new()), any: AtomicBool::new(false) }
    }

    /// Room for messages about so many vCPUs.
    pub fn reserve(&self, vcpus: usize) {
        self.messages.lock().reserve_exact(vcpus);
    }

    /// Adds a message. The receiver is to be kicked if it should see it soon.
    pub fn push(&self, message: Message) {
        let mut messages = self.messages.lock();
        debug_assert!(messages.len() < messages.capacity(), "one message about each vCPU");
        messages.push_back(message);
        // Before the sender looks whether the receiver sleeps: see `crate::sched::Cpu::wait`.
        self.any.store(true, Ordering::SeqCst);
    }

    /// Whether there are messages, without a lock.
    #[inline]
    pub fn is_empty(&self) -> bool {
        !self.any.load(Ordering::SeqCst)
    }

    /// Takes the oldest message out.
    pub fn pop(&self) -> Option<Message> {
        let mut messages = self.messages.lock();
        let message = messages.pop_front();
        self.any.store(!messages.is_empty(), Ordering::SeqCst);
        message
    }
}
