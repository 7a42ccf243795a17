# How a bare CUDA benchmark is compiled, given NVCC, FLAGS, HEADERS, BUILD and vpaths.
$(BUILD)/%.cu.o: %.cu $(HEADERS) | $(BUILD)
	$(NVCC) $(FLAGS) -c -o $@ $<
$(BUILD)/%.cc.o: %.cc $(HEADERS) | $(BUILD)
	$(NVCC) $(FLAGS) -c -o $@ $<
$(BUILD):
	mkdir -p $@

.PHONY: clean
clean:
	rm -rf $(BUILD)
