"""Preparation of data sets ahead of training: conversion, chunking and validation, by one worker or by many."""
