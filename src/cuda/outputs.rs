//! The outputs of calls out of place: checked against the gradients, and their table on the device.
//!
//! The table is always in device memory: what a list of 160 tensors leaves of 4096 bytes of parameters holds 13 outputs.
//! It is copied when the outputs are others than before. 16 bytes a tensor, on the device and in each staging buffer.

use super::device_table::DeviceTable;
use crate::abi::OutputDesc;
use crate::adapters::cudarc::{DeviceGradMut, DeviceList};
use crate::error::Result;
use crate::outputs::{check_pairs, in_outputs, refuse_shared};
use crate::plan::{Plan, TensorRef};
use cudarc::driver::CudaStream;
use std::sync::Arc;

/// What a launch needs of the outputs. Good as long as nothing else is prepared.
#[derive(Clone, Copy)]
pub(crate) struct Ready {
    /// Device address of the table.
    pub table: u64,
}

#[derive(Debug)]
pub(crate) struct Outputs {
    list: DeviceList,
    plan: Plan,
    /// Whether `plan` was checked against the plan that the clipper has of its gradients.
    checked: bool,
    rows: Vec<OutputDesc>,
    table: DeviceTable<OutputDesc>,
}

impl Outputs {
    pub(crate) fn new(stream: &Arc<CudaStream>) -> Self {
        Self {
            list: DeviceList::default(),
            plan: Plan::default(),
            checked: false,
            rows: Vec::new(),
            table: DeviceTable::new(stream, "the table of outputs"),
        }
    }

    pub(crate) fn gather<O: DeviceGradMut>(&mut self, outputs: &mut [O], stream: &CudaStream) -> Result<()> {
        self.list.gather_mut(outputs, stream).map_err(in_outputs)
    }

    /// As [`DeviceList::release_mut`].
    pub(crate) fn release<O: DeviceGradMut>(&mut self, outputs: &mut [O], stream: &CudaStream) -> Result<()> {
        self.list.release_mut(outputs, stream).map_err(in_outputs)
    }

    /// The plan of the gradients is another one from now on.
    pub(crate) fn forget_gradients(&mut self) {
        self.checked = false;
    }

    /// Checks the gathered outputs against the gradients, of which `plan` is the plan, and makes ready the table, whose
    /// address it gives. Allocates and copies as [`DeviceTable::set`] does. The context is current.
    pub(crate) fn prepare(
        &mut self,
        gradients: &[TensorRef],
        plan: &Plan,
        stream: &Arc<CudaStream>,
        capturing: bool,
    ) -> Result<Ready> {
        let same_list = self.checked && self.plan.is_for(self.list.tensors());
        if !(same_list && self.list.has_known_raw_pointers()) {
            self.list.check_raw_pointers(stream).map_err(in_outputs)?;
            if !same_list {
                self.check(gradients, plan)?;
            }
            self.list.remember_raw_pointers();
        }
        if plan.num_tiles() > 0 {
            self.table.set(&self.rows, capturing)?;
        }
        Ok(Ready { table: self.table.address() })
    }

    fn check(&mut self, gradients: &[TensorRef], plan: &Plan) -> Result<()> {
        self.checked = false;
        check_pairs(gradients, self.list.tensors())?;
        self.plan.update(self.list.tensors()).map_err(in_outputs)?;
        refuse_shared(plan, &self.plan)?;
        self.rows.clear();
        let row = |tensor: &TensorRef| OutputDesc { address: tensor.address, dtype: tensor.dtype as u32, reserved: 0 };
        self.rows.extend(self.list.tensors().iter().map(row));
        self.checked = true;
        Ok(())
    }

    pub(crate) fn device_bytes(&self) -> usize {
        self.table.device_bytes()
    }

    pub(crate) fn pinned_bytes(&self) -> usize {
        self.table.pinned_bytes()
    }
}
