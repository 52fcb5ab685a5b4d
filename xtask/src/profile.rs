//! The shim's profile of a run, and the functions that its addresses belong to.

use std::collections::BTreeMap;
use std::path::Path;

use addr2line::gimli::{Dwarf, EndianSlice, LittleEndian};
use anyhow::{Context, Result};
use object::{Object, ObjectSection};
use serde::Deserialize;

use crate::bare;
use crate::events::Address;
use crate::symbols::Symbols;

/// Equal visits of the hypervisor, each from a VM exit to the next VM entry.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Visit {
    /// RIP of the last instruction that the guest executed or tried to.
    pub guest: Address,
    /// Basic exit reason: SDM volume 3, appendix "VMX Basic Exit Reasons".
    pub reason: u16,
    /// Whether another VMCS was entered than was left.
    pub switched: bool,
    /// How many of them there were.
    pub count: u64,
    /// The hypervisor's instructions, and how often each was executed in one visit.
    pub instructions: Vec<(Address, u64)>,
}

impl Visit {
    /// Number of instructions that one visit took.
    pub fn total(&self) -> u64 {
        self.instructions.iter().map(|(_, times)| times).sum()
    }

    /// The same by function, the greatest first.
    ///
    /// # Errors
    /// If the debug information cannot be read.
    pub fn by_function(&self, functions: &Functions<'_>) -> Result<Vec<(String, u64)>> {
        let mut sums: BTreeMap<String, u64> = BTreeMap::new();
        for (address, times) in &self.instructions {
            *sums.entry(functions.function(*address)?).or_default() += times;
        }
        let mut sums: Vec<_> = sums.into_iter().collect();
        sums.sort_by_key(|(_, times)| std::cmp::Reverse(*times));
        Ok(sums)
    }
}

/// The functions of an ELF file.
pub struct Functions<'a> {
    symbols: Symbols,
    debug: addr2line::Context<EndianSlice<'a, LittleEndian>>,
}

impl<'a> Functions<'a> {
    /// Reads its symbols and debug information.
    ///
    /// # Errors
    /// If it is not an ELF file or the debug information is damaged.
    pub fn of(elf: &'a [u8]) -> Result<Self> {
        let file = object::File::parse(elf).context("not an ELF file")?;
        let symbols = Symbols::of(&file);
        let section = |name: &str| {
            let data = file.section_by_name(name).and_then(|section| section.data().ok());
            EndianSlice::new(data.unwrap_or_default(), LittleEndian)
        };
        let dwarf = Dwarf::load(|id| Ok::<_, addr2line::gimli::Error>(section(id.name())))?;
        let debug = addr2line::Context::from_dwarf(dwarf).context("debug information")?;
        Ok(Self { symbols, debug })
    }

    /// The names of all of them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.symbols.names()
    }

    /// The symbol that an address lies in.
    pub fn symbol(&self, address: Address) -> Option<&str> {
        self.symbols.at(address).map(|(name, _)| name)
    }

    /// The function that an address comes from, inlined or not. Those of libraries count as part of
    /// this project's that call them, where the debug information tells.
    fn function(&self, address: Address) -> Result<String> {
        let mut frames = self.debug.find_frames(address.0).skip_all_loads()?;
        while let Some(frame) = frames.next()? {
            let file = frame.location.as_ref().and_then(|location| location.file);
            let ours = file.is_some_and(|file| Path::new(file).starts_with(bare::SOURCES));
            if let (true, Some(function)) = (ours, frame.function) {
                return Ok(function.demangle()?.into_owned());
            }
        }
        Ok(self.symbol(address).map_or_else(|| address.to_string(), str::to_owned))
    }
}
